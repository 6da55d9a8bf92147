"""Ways a registry directory can be wrong. No status here: gateway/ gives one where it answers."""


class RegistryError(Exception):
    """Something in the registry directory is not as it must be."""
