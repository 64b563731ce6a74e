-- The workers' book: who is live and serves what. From it follows the digest that producers read, whose size
-- goes with the number of models that are served, not with that of workers.
--
-- book     its keys, all of which begin so:
--            :until    zset  names of workers, by when their announcements expire
--            :group    hash  name -> group: the workers that serve the same
--            :served   hash  group -> what it serves and reads, and whether it pauses, as members of a JSON object
--            :version  string, changed with each change of the digest; :seen the one that was last noted
--            :of:<group>  zset  names of a group, by when they started
-- digest   the key of the digest: JSON, see `worker.state.fleet`
-- names    the key of the set of all names, where workers of earlier versions are, too
-- include ../contract/clock.lua
local time = tonumber(now())

local function leave(book, name)
  local group = redis.call('HGET', book .. ':group', name)
  if not group then return false end
  redis.call('HDEL', book .. ':group', name)
  redis.call('ZREM', book .. ':until', name)
  redis.call('ZREM', book .. ':of:' .. group, name)
  if redis.call('EXISTS', book .. ':of:' .. group) == 0 then redis.call('HDEL', book .. ':served', group) end
  return true
end

local function enter(book, name, until_s, group, served, started_at)
  redis.call('ZADD', book .. ':until', until_s, name)
  if redis.call('HGET', book .. ':group', name) == group
      and tonumber(redis.call('ZSCORE', book .. ':of:' .. group, name)) == tonumber(started_at) then
    return false
  end
  leave(book, name)
  redis.call('ZADD', book .. ':until', until_s, name)
  redis.call('HSET', book .. ':group', name, group)
  redis.call('HSET', book .. ':served', group, served)
  redis.call('ZADD', book .. ':of:' .. group, started_at, name)
  return true
end

-- Removes workers that no longer announce themselves, up to 100 at a time.
local function sweep(book, names)
  local gone = redis.call('ZRANGEBYSCORE', book .. ':until', '-inf', string.format('%.6f', time), 'LIMIT', 0, 100)
  for _, name in ipairs(gone) do
    leave(book, name)
    redis.call('SREM', names, name)
  end
  return #gone > 0
end

-- Whether a worker of an earlier version is live: it is among the names alone. Names that are left over are
-- removed; as that reads all of them, it is done once in 5 seconds at most.
local function is_mixed(book, names)
  if redis.call('SCARD', names) <= redis.call('ZCARD', book .. ':until') then return false end
  if redis.call('SET', book .. ':looked', 1, 'NX', 'EX', 5) then
    for _, name in ipairs(redis.call('SMEMBERS', names)) do
      if not redis.call('ZSCORE', book .. ':until', name)
          and redis.call('EXISTS', 'smallcat:worker:' .. name) == 0 then
        redis.call('SREM', names, name)
      end
    end
  end
  return redis.call('SCARD', names) > redis.call('ZCARD', book .. ':until')
end

local function member(key, at)
  local found = redis.call('ZRANGE', key, at, at, 'WITHSCORES')
  return '[' .. found[2] .. ',' .. cjson.encode(found[1]) .. ']'
end

-- Writes the digest, if it is to change or is missing. Returns the version that is to be noted, or ''.
local function publish(book, digest, names, ttl, is_changed)
  local mixed = is_mixed(book, names)
  local was_mixed = redis.call('EXISTS', book .. ':mixed') == 1
  if is_changed or mixed ~= was_mixed or redis.call('EXPIRE', digest, ttl) == 0 then
    -- With an expiry: the last worker of this version that leaves announces nothing that would renew one.
    if mixed then redis.call('SET', book .. ':mixed', 1, 'EX', ttl) else redis.call('DEL', book .. ':mixed') end
    local groups = {}
    local served = redis.call('HGETALL', book .. ':served')
    for i = 1, #served, 2 do
      local key = book .. ':of:' .. served[i]
      groups[#groups + 1] = '{' .. served[i + 1] .. ',"workers":' .. redis.call('ZCARD', key)
        .. ',"first":' .. member(key, 0) .. ',"last":' .. member(key, -1) .. '}'
    end
    local version = redis.call('INCR', book .. ':version')
    redis.call('SET', digest, '{"version":' .. version .. ',"mixed":' .. tostring(mixed) .. ',"groups":['
               .. table.concat(groups, ',') .. ']}', 'EX', ttl)
  end
  local version, seen = unpack(redis.call('MGET', book .. ':version', book .. ':seen'))
  return version == seen and '' or version
end

-- Lets the book expire, should no worker announce itself any more.
local function keep(book, group, ttl)
  for _, part in ipairs({':until', ':group', ':served', ':version', ':seen', ':mixed', ':of:' .. group}) do
    redis.call('EXPIRE', book .. part, ttl)
  end
end
