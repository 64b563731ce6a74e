"""Files beside the model that jobs name: LoRAs, embeddings and VAEs. `file_store` is the door."""
