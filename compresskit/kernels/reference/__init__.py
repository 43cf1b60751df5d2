"""The specification of every op, in plain torch; runs on any device."""
