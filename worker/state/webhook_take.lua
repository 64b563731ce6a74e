-- Gives notifications that are due to a sender, which holds each for some seconds. What jobs' scripts have told
-- since the last call is put into the book of notifications first.
--
-- ARGV     how many at most, seconds that they are held, how many a host at most, those that this sender sends
--          now as a JSON object by host, and as JSON the shares of `worker.state.notifications.Shares`
-- Returns  for each: id, host, attempts so far, when it was told, the entry as JSON
--
-- Of producers' entries only those are taken that a producer may tell: that a submission was given up, that a
-- run is over.
-- include webhook_book.lua
local most, held_s, per_host, busy, shares = unpack(ARGV)
most, held_s, per_host, busy = tonumber(most), tonumber(held_s), tonumber(per_host), cjson.decode(busy)
shares = cjson.decode(shares)

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

local taken, skipped = {}, {}
local tenants, names, slow = shares.tenants or {}, shares.names or {}, shares.slow or {}

-- A host without its port: one machine has many.
local function name_of(host)
  return (string.gsub(string.gsub(host, ':%d*$', ''), '%.$', ''))
end
local function room_at(host)
  local name = name_of(host)
  local of_name = (slow[name] and shares.per_slow or shares.per_name or most) - (names[name] or 0)
  return math.min(per_host - (busy[host] or 0), most - #taken, of_name)
end
local function tenant_in(entry)
  local ok, fields = pcall(cjson.decode, entry)
  local read, hook = pcall(cjson.decode, ok and type(fields) == 'table' and fields.hook)
  local tenant = read and type(hook) == 'table' and hook.tenant
  return type(tenant) == 'string' and tenant or ''
end
local function has_room(tenant, limit)
  return not limit or (tenants[tenant] or 0) < limit
end
local function hold(one, tenant)
  local id, host = one[1], one[2]
  redis.call('ZADD', BOOK .. ':due:' .. host, time + held_s, id)
  taken[#taken + 1] = one
  local name = name_of(host)
  busy[host], names[name] = (busy[host] or 0) + 1, (names[name] or 0) + 1
  tenants[tenant] = (tenants[tenant] or 0) + 1
end

local hosts = redis.call('ZRANGEBYSCORE', BOOK .. ':hosts', '-inf', time, 'LIMIT', 0, 1000)
for _, host in ipairs(hosts) do
  local room, due, is_skipped = room_at(host), BOOK .. ':due:' .. host, false
  if room > 0 then
    -- Behind those of a tenant that has its share may be others'.
    local more = shares.per_tenant and 20 or 0
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', due, '-inf', time, 'LIMIT', 0, room + more)) do
      local entry, attempts, told_at = unpack(redis.call('HMGET', BOOK .. ':of:' .. id, 'entry', 'attempts', 'told_at'))
      local tenant = entry and tenant_in(entry)
      if not entry then
        redis.call('ZREM', due, id)
      elseif not has_room(tenant, shares.per_tenant) then
        is_skipped = true
        if #skipped < most then skipped[#skipped + 1] = {{id, host, attempts, told_at, entry}, tenant} end
      elseif room_at(host) > 0 then
        hold({id, host, attempts, told_at, entry}, tenant)
      end
    end
    refresh(host)
    -- Where more hosts are due than are looked at, the others are next.
    if is_skipped and #hosts == 1000 then redis.call('ZADD', BOOK .. ':hosts', time + 1, host) end
  end
  if #taken >= most then break end
end
-- What the others leave, up to a limit: those that come next find room.
for _, each in ipairs(skipped) do
  local one, tenant = unpack(each)
  if has_room(tenant, shares.alone) and room_at(one[2]) > 0 then
    hold(one, tenant)
    refresh(one[2])
  end
end
return taken
