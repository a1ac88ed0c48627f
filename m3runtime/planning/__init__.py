"""Planning: the size and the cost of a bank before it is written."""
