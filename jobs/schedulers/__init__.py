"""Jobs handed to whoever runs them: Slurm, a Ray cluster, Kubernetes, cron.

Each of `slurm`, `ray_jobs`, `kubernetes` and `crontab` has `render`, the submission as a text that
can be sent by hand, and `send`, which sends it and says what came of it.
"""
