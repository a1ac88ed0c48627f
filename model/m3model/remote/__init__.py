"""An engine at a URL: a server of vLLM whose connector has the same bank."""
