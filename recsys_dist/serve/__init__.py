"""Serving: pure classes over a bundle, and in `app` the Ray Serve deployments that carry them."""
