"""The coordinator: plans, schedules and serves. It computes nothing itself."""
