"""Messages, framing, authentication, and the channels they travel on."""
