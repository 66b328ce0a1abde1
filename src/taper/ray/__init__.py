"""Scale-out with Ray Serve: replicas of the engine behind the same HTTP server (`taper serve --ray`)."""
