-- Writes what is to be told by webhooks into a list, from which the sender takes it (`webhook_take.lua`). An entry is its id, a blank, and JSON. The id follows from what is told: told
-- twice, it is one notification.
--
-- Workers write where nobody else may, producers into a list of their own. A producer's user that may not yet
-- leaves what is to be told with the job, for the worker that finds its message.
-- include ../contract/clock.lua
-- Seconds that they are kept while no sender runs.
local UNTOLD_TTL_S = 518400
local TOLD_BY_WORKERS, TOLD_BY_PRODUCERS = 'smallcat:worker-only:webhooks:new', 'smallcat:webhooks:new'
local function notify(list, what, fields)
  fields.at = now()
  local told = redis.pcall('LPUSH', list, redis.sha1hex(what) .. ' ' .. cjson.encode(fields))
  if type(told) ~= 'number' then return false end
  redis.call('EXPIRE', list, UNTOLD_TTL_S)
  return true
end
-- The same for a job's submissions that have a webhook, each once.
--
-- key      the job's record, in its new state
-- state    that state; submissions that were given up are cancelled
-- only     that submission alone; nil: all
local function notify_submissions(list, key, state, only)
  local job = string.sub(key, 1 + string.len('smallcat:job:'))
  local uri, kind, text, cached = unpack(redis.call('HMGET', key, 'uri', 'error_type', 'error', 'cached'))
  local is_left = false
  for _, field in ipairs(redis.call('HKEYS', key)) do
    local submission = string.match(field, '^hook:(%w+)$')
    if submission and (not only or submission == only) then
      local own = redis.pcall('GET', key .. ':' .. submission)
      if type(own) ~= 'string' then own = '' end
      local ended = string.sub(own, 1, 1) == '-' and 'cancelled' or state
      local fields = {job = job, submission = submission, state = ended, own = string.sub(own, 2),
                      hook = redis.call('HGET', key, field)}
      if ended == 'done' then
        fields.uri, fields.cached = uri or nil, cached == 'true' or nil
      elseif ended == 'failed' then
        fields.error_type, fields.error = kind or nil, text or nil
      end
      if notify(list, job .. ':' .. submission .. ':' .. ended, fields) then redis.call('HDEL', key, field) end
    end
    is_left = is_left or submission and redis.call('HEXISTS', key, field) == 1
  end
  if not is_left then redis.call('HDEL', key, 'hooks') end
end
-- The same for a run that is over.
local function notify_run(list, key, run, hook, state, created, total, rejected)
  local cancelled = redis.call('BITCOUNT', key .. ':cancelled')
  return notify(list, table.concat({'run', run, created or '', state}, ':'), {run = run, state = state, hook = hook,
    total = tonumber(total), done = redis.call('BITCOUNT', key .. ':done'), cancelled = cancelled,
    failed = redis.call('BITCOUNT', key .. ':failed') - cancelled, rejected = tonumber(rejected or 0)})
end
