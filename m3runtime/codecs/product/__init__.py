"""The `product` codec: a vector quantiser trained on the memories of a bank."""
