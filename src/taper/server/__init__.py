"""OpenAI's HTTP interface over the batch engine, with deadlines and bits for each request."""
