"""Ways to train that need more than one distiller, or more than one student."""
