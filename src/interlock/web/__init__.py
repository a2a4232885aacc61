"""The front's outside: OpenAI's API, the admin API, health and metrics over HTTP."""
