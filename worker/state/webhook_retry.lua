-- Lets notifications be sent again that were given up, with all their attempts, and at once those that wait.
--
-- ARGV     ids
-- Returns  how many there were
-- include webhook_book.lua
local count = 0
for i = 1, #ARGV do
  local of = BOOK .. ':of:' .. ARGV[i]
  local host = redis.call('HGET', of, 'host')
  if host and (redis.call('ZREM', BOOK .. ':failed', ARGV[i]) == 1
      or redis.call('ZSCORE', BOOK .. ':due:' .. host, ARGV[i])) then
    redis.call('HSET', of, 'attempts', 0)
    redis.call('EXPIRE', of, KEPT_S)
    plan(ARGV[i], host, time)
    count = count + 1
  end
end
return count
