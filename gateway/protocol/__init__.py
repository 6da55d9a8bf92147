"""Bytes to calls and answers to bytes. Pure: knows no socket, no session and no route."""
