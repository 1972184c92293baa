"""The stages over one run folder, one function each: takes the workspace and the facts of earlier stages, writes its
result into the folder, and returns facts about it as JSON. Their order is not known here (see `pipeline`)."""
