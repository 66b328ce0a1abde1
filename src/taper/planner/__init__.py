"""Planning: which requests to serve and at which bits, so that promises hold."""
