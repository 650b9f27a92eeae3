"""An experiment over clients that dial in: the server's run, and the life of a client."""
