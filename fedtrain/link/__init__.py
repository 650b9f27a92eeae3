"""How messages travel between processes: identity, frames, the server end and the client end."""
