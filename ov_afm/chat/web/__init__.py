"""The chat's page in the browser, built with Gradio."""
