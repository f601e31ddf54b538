"""Many requests from a file, answered by the code of the server, into another file."""
