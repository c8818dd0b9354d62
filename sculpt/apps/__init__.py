"""What stands on top of the library: the command line, the explorer of notebooks, the demos. Nothing imports them."""
