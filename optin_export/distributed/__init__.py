"""Run the same work on several processes or machines with Ray.

Only `ray_session` imports Ray. Work is sent and returned as values, never as paths, unless the workers share this
machine's files.
"""
