-- The book of notifications: what is to be sent, by host and time.
--
--   :of:<id>      hash  a notification: entry, host, attempts, told_at, and how its last attempt ended
--   :due:<host>   zset  ids by when they are due; those that a sender holds, by when they come back
--   :hosts        zset  hosts, by when the first of theirs is due
--   :failed       zset  ids of those that are given up, by when
-- include ../contract/clock.lua
local BOOK = 'smallcat:worker-only:webhooks'
-- Seconds that a notification is kept after its last attempt: longer than any pause.
local KEPT_S = 518400
local time = now()

-- Notes when the first notification of a host is due.
local function refresh(host)
  local first = redis.call('ZRANGE', BOOK .. ':due:' .. host, 0, 0, 'WITHSCORES')
  if first[2] then
    redis.call('ZADD', BOOK .. ':hosts', first[2], host)
    redis.call('EXPIRE', BOOK .. ':hosts', KEPT_S)
    redis.call('EXPIRE', BOOK .. ':due:' .. host, KEPT_S)
  else
    redis.call('ZREM', BOOK .. ':hosts', host)
  end
end

local function plan(id, host, at)
  redis.call('ZADD', BOOK .. ':due:' .. host, at, id)
  refresh(host)
end
