"""Schedules of bits found by measurement on a task of the user's own."""
