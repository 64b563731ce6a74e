-- Notes how an attempt at a notification ended.
--
-- ARGV     id, host, 'sent', 'later' or 'failed', seconds until the next attempt, how it ended in words,
--          seconds that one that is given up is kept, how many of these are
-- Returns  1; 0 where another sender has settled it meanwhile
--
-- One that came back, because its sender seemed dead, may be sent by two: the one that reaches its receiver wins.
-- include webhook_book.lua
local id, host, ended, delay_s, text, kept_s, most = unpack(ARGV)
local due, of = BOOK .. ':due:' .. host, BOOK .. ':of:' .. id
local is_there = redis.call('ZREM', due, id) == 1
if ended == 'sent' then
  redis.call('DEL', of)
  redis.call('ZREM', BOOK .. ':failed', id)
elseif is_there then
  redis.call('HINCRBY', of, 'attempts', 1)
  redis.call('HSET', of, 'ended', text, 'ended_at', time)
  if ended == 'failed' then
    redis.call('EXPIRE', of, kept_s)
    redis.call('ZADD', BOOK .. ':failed', time, id)
    redis.call('EXPIRE', BOOK .. ':failed', kept_s)
    redis.call('ZREMRANGEBYSCORE', BOOK .. ':failed', '-inf', time - kept_s)
    local many = redis.call('ZCARD', BOOK .. ':failed') - most
    for _, old in ipairs(many > 0 and redis.call('ZRANGE', BOOK .. ':failed', 0, many - 1) or {}) do
      redis.call('DEL', BOOK .. ':of:' .. old)
      redis.call('ZREM', BOOK .. ':failed', old)
    end
  else
    redis.call('ZADD', due, time + delay_s, id)
    redis.call('EXPIRE', of, KEPT_S)
  end
end
refresh(host)
return is_there and 1 or 0
