"""Where images come from; one file a kind of source, `open.open_source` chooses among them."""
