-- Marks a run as cancelled, and tells its webhook. Also where Redis is full: that makes room.
--
-- KEYS     the run, a key of its own that nobody writes
--
-- A full Redis refuses a script's first write if that may take memory, and none after it: so it deletes first.
-- A producer's user may delete keys of runs, and no field of them.
-- include notify.lua
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[1], 'cancelled', math.floor(now()))
local hook, created, total, rejected = unpack(redis.call('HMGET', KEYS[1], 'webhook', 'created', 'total', 'rejected'))
if hook then
  notify_run(TOLD_BY_PRODUCERS, KEYS[1], string.sub(KEYS[1], 1 + string.len('smallcat:run:')), hook, 'cancelled', created,
             total, rejected)
end
