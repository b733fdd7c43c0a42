"""The chat: conversations, what answers them, and the terminal and browser that show them."""
