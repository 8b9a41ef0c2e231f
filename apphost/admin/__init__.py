"""The process behind the setting `admin`: metrics, health, readiness, and a dashboard."""
