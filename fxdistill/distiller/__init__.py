"""``wrap`` and the ``Distiller`` that it returns: what a user holds in hand."""
