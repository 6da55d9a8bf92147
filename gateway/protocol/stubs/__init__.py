"""Generated from inference.proto by `make stubs`; never edited."""
