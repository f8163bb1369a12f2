-- Counts one request of a principal in the minute that runs, unless one of its key's rates is used up.
-- KEYS  1 rl:<principal>:requests:<minute> (int)  2 rl:<principal>:tokens:<minute> (int)
-- ARGV  1 requests per minute, "" for no limit  2 tokens per minute, "" for no limit  3 seconds a counter is kept
-- Returns {1, requests, tokens} counted so far, this one among them; {0, requests, tokens} where it is refused.
local request_limit, token_limit = tonumber(ARGV[1]), tonumber(ARGV[2])
local requests = tonumber(redis.call('GET', KEYS[1]) or 0)
local tokens = tonumber(redis.call('GET', KEYS[2]) or 0)
if (request_limit and requests >= request_limit) or (token_limit and tokens >= token_limit) then
  return { 0, requests, tokens }
end
if request_limit then
  requests = redis.call('INCR', KEYS[1])
  redis.call('EXPIRE', KEYS[1], ARGV[3])
end
return { 1, requests, tokens }
