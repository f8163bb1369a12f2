-- Appends one record to the log, once.
-- KEYS  1 fb:log (stream)  2 fb:idem:* (string)  3 fb:id:* (string)  4 fb:pair:* (string; comparisons and ratings only)
--       5 task:seen:* (set of the prompts a labeler has judged; comparisons only)
-- ARGV  1 kind  2 record id  3 json  4 sha256 of json  5 body digest  6 idempotency TTL in seconds  7 task, "" for none
--       8 digest of the prompt  9 TTL of the set in seconds
-- Returns {"new" | "replayed" | "reuse", stream id}: reuse means that the first body was another one.
local first = redis.call('GET', KEYS[2])
if first then
  local stream_id, body_digest = string.match(first, '^(%S+) (%S+)$')
  -- Where the first record was erased, this one is the first.
  if #redis.call('XRANGE', KEYS[1], stream_id, stream_id) == 1 then
    return { body_digest == ARGV[5] and 'replayed' or 'reuse', stream_id }
  end
end
-- The first write is the one that a full Redis refuses; after it the others are let through.
local stream_id = redis.call('XADD', KEYS[1], '*', 'kind', ARGV[1], 'id', ARGV[2], 'json', ARGV[3], 'sha256', ARGV[4])
redis.call('SET', KEYS[2], stream_id .. ' ' .. ARGV[5], 'EX', ARGV[6])
redis.call('SET', KEYS[3], stream_id)
if KEYS[4] then
  local task = string.match(redis.call('GET', KEYS[4]) or '', ' (%S+)$')
  -- Judged again in another task it is a repetition, which replaces nothing.
  if not task or ARGV[7] == '' or ARGV[7] == task then
    redis.call('SET', KEYS[4], ARGV[2] .. ' ' .. (task or ARGV[7]))
  end
end
if KEYS[5] then
  redis.call('SADD', KEYS[5], ARGV[8])
  redis.call('EXPIRE', KEYS[5], ARGV[9])
end
return { 'new', stream_id }
