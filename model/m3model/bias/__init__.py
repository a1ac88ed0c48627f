"""Keys that raise a logit by the same amount for every query: fitted to a model's queries, and measured."""
