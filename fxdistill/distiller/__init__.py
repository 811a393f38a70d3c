"""``wrap`` and the ``Distiller`` that it returns."""
