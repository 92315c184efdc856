"""Errors of export, apart from the parts that raise them: those import much that other scripts do not need."""


class ExportError(ValueError):
    """A network cannot be written as asked; one line with the reason or the remedy."""
