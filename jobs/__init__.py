"""Entry points, for a shell or `ray job submit`: parse, one call, print."""
