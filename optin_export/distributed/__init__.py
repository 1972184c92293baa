"""The same work on several processes or machines, by Ray.

Only `ray_session` imports Ray. What it offers is data in, data out; what is sent are values, never paths, unless the
workers share this machine's files.
"""
