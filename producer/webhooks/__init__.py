"""Sends notifications to webhooks: `sender` is the door, `secrets` what signs them; extra: `http`."""
