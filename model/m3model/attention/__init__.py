"""Attention over memories, sink and context: layout, buffers, masks, token selection."""
