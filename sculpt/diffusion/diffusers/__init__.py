"""The border to diffusers: schedules, networks and pipelines come in, compositions go out."""
