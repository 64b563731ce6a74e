-- The first write of a worker's script; it does nothing. A full Redis refuses a script's first write if that
-- may take memory, and none after it. Workers go on, which is what makes room.
redis.pcall('HDEL', KEYS[1], '')
