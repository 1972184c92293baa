"""Files that are copied into a model repository and run in the server's own Python; they do not import this package."""
