"""The calls of HTTP over gRPC: what they do in service, how they are carried in carrier."""
