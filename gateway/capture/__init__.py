"""Sampled requests and answers on disk, to be looked at, replayed and simulated.

record: what is kept of one request, and its bytes. shelf: the files of a host, bounded together.
log: the buffer and the thread between answers and files. reading: what files hold.
"""
