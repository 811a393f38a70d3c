"""Which student value is compared with which teacher value: written, proposed, resolved, saved."""
