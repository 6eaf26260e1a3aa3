"""OpenAI-compatible HTTP and WebSocket service, its metrics, and the web page."""
