"""Files that are copied into a model repository and run inside the server's own Python; they import nothing of ours."""
