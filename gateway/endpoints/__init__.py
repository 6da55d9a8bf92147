"""HTTP, a file per plane; each route says which scope may call it."""
