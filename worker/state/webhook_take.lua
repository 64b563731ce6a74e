-- Gives notifications that are due to a sender, which holds each for some seconds. What jobs' scripts have told
-- since the last call is put into the book of notifications first.
--
-- ARGV     how many at most, seconds that they are held, how many a host at most, those that this sender sends
--          now as a JSON object by host
-- Returns  for each: id, host, attempts so far, when it was told, the entry as JSON
--
-- Of producers' entries only those are taken that a producer may tell: that a submission was given up, that a
-- run is over.
-- include webhook_book.lua
local most, held_s, per_host, busy = unpack(ARGV)
most, held_s, per_host, busy = tonumber(most), tonumber(held_s), tonumber(per_host), cjson.decode(busy)

local function put(entry, by_producer)
  local digest, text = string.match(entry, '^(%x+) (.*)$')
  local ok, fields = pcall(cjson.decode, text or '')
  if not ok or type(fields) ~= 'table' or #digest ~= 40 or #text > 65536 then return end
  if by_producer and not (fields.run or fields.state == 'cancelled') then return end
  local read, hook = pcall(cjson.decode, fields.hook)
  local url = read and type(hook) == 'table' and hook.url
  local host = string.lower(string.match(type(url) == 'string' and url or '', '^%a+://([^/?#]+)') or '')
  local id = (by_producer and 'p' or 'w') .. digest
  if #host > 300 then return end
  -- One that was given up, and is told again, is sent again.
  local is_given_up = redis.call('ZREM', BOOK .. ':failed', id) == 1
  if redis.call('HSETNX', BOOK .. ':of:' .. id, 'entry', text) == 0 and not is_given_up then return end
  redis.call('HSET', BOOK .. ':of:' .. id, 'host', host, 'attempts', 0, 'told_at', time)
  redis.call('EXPIRE', BOOK .. ':of:' .. id, KEPT_S)
  plan(id, host, time)
end
for i, list in ipairs({BOOK .. ':new', 'smallcat:webhooks:new'}) do
  for _ = 1, 200 do
    local entry = redis.call('RPOP', list)
    if not entry then break end
    put(entry, i == 2)
  end
end

local taken = {}
for _, host in ipairs(redis.call('ZRANGEBYSCORE', BOOK .. ':hosts', '-inf', time, 'LIMIT', 0, 1000)) do
  local room = math.min(per_host - (busy[host] or 0), most - #taken)
  if room > 0 then
    local due = BOOK .. ':due:' .. host
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', due, '-inf', time, 'LIMIT', 0, room)) do
      local entry, attempts, told_at = unpack(redis.call('HMGET', BOOK .. ':of:' .. id, 'entry', 'attempts', 'told_at'))
      if entry then
        redis.call('ZADD', due, time + held_s, id)
        taken[#taken + 1] = {id, host, attempts, told_at, entry}
      else
        redis.call('ZREM', due, id)
      end
    end
    refresh(host)
  end
  if #taken >= most then break end
end
return taken
