"""The demo: a year of real flights, replayed through a real server."""
